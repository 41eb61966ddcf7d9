"""Measuring speed: cases, engines side by side, and what each stage could take at best."""

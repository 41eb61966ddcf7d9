"""Outrider inside other projects' programs. Each module here imports its project, an extra that need not be installed."""

"""RULER's synthetic families (Hsieh et al. 2024, arXiv 2404.06654), made from a given book."""

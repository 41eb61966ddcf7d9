"""Task "diagnose": where lists and drafts fall short, by layer, head and position."""

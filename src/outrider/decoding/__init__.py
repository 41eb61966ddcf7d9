"""Decoding: sequences in, tokens out, round by round."""

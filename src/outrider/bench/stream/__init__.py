"""The rate at which a device streams its memory: what every floor is computed from."""

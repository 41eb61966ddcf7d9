"""The method as pure functions of types: alignment, calibration and token selection. Knows nothing of models."""

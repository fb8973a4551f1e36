"""Running a quantized model: as training simulates it, and as it is deployed."""

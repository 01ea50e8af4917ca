"""Eight bits: calibration, quantised ONNX graphs, and how many detections they keep."""

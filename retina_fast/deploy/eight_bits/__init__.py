"""Eight bits: calibration, quantised ONNX graphs, FP8's scales, and how many detections are kept."""

"""Loading detectors, predicting on any source, results and their files, evaluating on data sets."""

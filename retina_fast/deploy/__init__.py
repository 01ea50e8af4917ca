"""The engine, exported files in every format, eight bits, and other homes of models: the Hub, DeepForest."""

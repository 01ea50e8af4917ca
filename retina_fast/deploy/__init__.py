"""The engine, exported files, eight bits, `retina-fast bench`, and other homes of models: the Hub, DeepForest."""

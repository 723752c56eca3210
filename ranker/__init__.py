"""Floor 2: the ranking model on TorchRec, its arms, its metrics, and the statistics that compare arms."""

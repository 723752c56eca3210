"""Training infrastructure: distributed start-up, the commit protocol, Parquet streaming, tracking, configuration."""

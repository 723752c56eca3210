"""What training stands on: distributed start-up, the commit protocol, Parquet streaming, tracking, configuration."""

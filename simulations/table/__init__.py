"""A study's ways of training side by side: pooled, federated, with privacy, each site alone."""

"""From preference data to batches. Alone imports grain and datasets."""

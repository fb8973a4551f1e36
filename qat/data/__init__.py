"""Training sequences: shards of token ids, and the order in which a run reads them."""

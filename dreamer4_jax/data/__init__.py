"""Episodes, their storage as ArrayRecord shards, and the pipelines that read them."""

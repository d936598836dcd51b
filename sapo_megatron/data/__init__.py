"""Problems -> prompts; groups -> packed micro-batches."""

"""A repository of the Hugging Face Hub: its files, fetched by ranges, checked and retried."""

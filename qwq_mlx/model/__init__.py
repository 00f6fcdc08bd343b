"""Files to a checked model, messages to a prompt, headers to a memory plan."""

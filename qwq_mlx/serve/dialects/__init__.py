"""The words of each family of clients: a body becomes an `Ask`, and events become what that client reads."""

"""Several processes hold one model: rank 0 leads (`leader`), the others follow it (`follower`), over links (`link`)."""

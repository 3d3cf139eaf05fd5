"""Programs that turn a raw data release into prepared cases and one manifest."""

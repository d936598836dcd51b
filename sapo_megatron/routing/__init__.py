"""The router of a Mixture-of-Experts model: record, replay, measure."""

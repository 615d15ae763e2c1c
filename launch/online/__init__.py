"""The way from a run's folder to W&B, and back: mirror, sync, dashboards, tags, artifacts."""

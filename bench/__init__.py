"""Speed of this project's PPO beside its peer's."""

"""Fine-tuning and reinforcement learning of an HRM-Text with TRL's own trainers, each in one short script."""

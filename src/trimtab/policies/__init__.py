"""Policies that pick a feature at each token: networks, masks, rollouts, PPO."""

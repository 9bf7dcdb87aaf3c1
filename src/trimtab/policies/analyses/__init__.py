"""What a trained policy did and where it mattered: branch points, critic, layers, feature ledger."""

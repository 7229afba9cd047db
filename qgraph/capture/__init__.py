"""From an nn.Module to torch.fx graphs."""

"""What each part of the method adds: ways to choose the blocks that go, and ways to train what stands for them."""

"""`kubectl ivft`: what a user asks about runs, answered from their own kubeconfig. It needs no operator to be there."""

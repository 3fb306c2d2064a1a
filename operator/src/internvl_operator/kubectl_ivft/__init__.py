"""The plugin `kubectl ivft`: list, explain and control runs with the user's own kubeconfig, without an operator."""

"""The stages of an InternVL fine-tuning run."""

"""What game, device and host say to each other: messages, topics, formats, and the one MQTT adapter."""

"""Migration protocol of Cloud Hypervisor with an offload daemon: restores (S10), and the messages of checkpoints."""

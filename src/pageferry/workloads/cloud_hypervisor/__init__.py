"""VMs of Cloud Hypervisor whose memory is shared (`--memory shared=on`), as workloads that can be saved."""

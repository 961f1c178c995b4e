"""Operations of users on workloads, by name: pause, resume and end workloads; logs, consoles, monitors and saved
disks."""

"""Programs that pageferry is compared with, driven through their own interfaces."""

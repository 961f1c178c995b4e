"""The programs that pageferry is measured against, driven through their own interfaces."""

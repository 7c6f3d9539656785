"""The methods that BAGS is compared with; import the one you need by its path."""

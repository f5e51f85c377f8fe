"""What a released model needs: branches, the card, who can load it, the hub, weight differences."""

"""Who may do what: identities, scopes, limits and certificates of the hub's two ports."""

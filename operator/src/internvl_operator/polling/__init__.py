"""Everything that talks to pods: who answers, and how far they have got."""

"""How near a student is to its teacher beyond tasks: distributions by position, generations, untrained students."""

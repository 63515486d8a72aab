"""Several devices and processes: `sharding` (mesh and layouts), `distributed` (who takes part), `coordination`."""

// Command kubernetes is several Kubernetes daemons in one binary: the name of the symlink that starts it picks the daemon.
// One link step instead of five saves most of the build time and of the disk space. The build tag `nodes` picks the
// daemons of nodes instead of the control plane's, because the oldest release is tested without nodes.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
)

func run(command *cobra.Command) int {
	return cli.Run(command)
}

func main() {
	name := filepath.Base(os.Args[0])
	start, known := daemons[name]
	if !known {
		fmt.Fprintf(os.Stderr, "unknown daemon %q: start this binary through a symlink named as a Kubernetes daemon\n", name)
		os.Exit(2)
	}
	os.Exit(start())
}

// Command kubernetes is every Kubernetes daemon in one binary, with two stand-ins for the tests: the name of the symlink
// that starts it picks the daemon.
// One link step instead of five saves most of the build time and of the disk space.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func daemon(name string) *cobra.Command {
	switch name {
	case "kube-apiserver":
		return apiserver.NewAPIServerCommand()
	case "kube-controller-manager":
		return manager.NewControllerManagerCommand()
	case "kube-scheduler":
		return scheduler.NewSchedulerCommand()
	case "kubelet":
		return kubelet.NewKubeletCommand(context.Background())
	case "kube-proxy":
		return proxy.NewProxyCommand()
	}
	return nil
}

func main() {
	name := filepath.Base(os.Args[0])
	var err error
	switch name {
	case "device-plugin":
		err = serveDevices(os.Args[1:])
	case "logind":
		err = serveLogin(os.Args[1])
	default:
		os.Exit(runDaemon(name))
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

func runDaemon(name string) int {
	command := daemon(name)
	if command == nil {
		fmt.Fprintf(os.Stderr, "unknown daemon %q: start this binary through a symlink named as a Kubernetes daemon\n", name)
		return 2
	}
	return cli.Run(command)
}

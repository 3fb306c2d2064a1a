//go:build nodes

package main

import (
	"context"
	"fmt"
	"os"

	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// The scheduler is here because nothing is scheduled where no nodes are. The last two are stand-ins for the tests.
var daemons = map[string]func() int{
	"kube-scheduler": func() int { return run(scheduler.NewSchedulerCommand()) },
	"kubelet":        func() int { return run(kubelet.NewKubeletCommand(context.Background())) },
	"kube-proxy":     func() int { return run(proxy.NewProxyCommand()) },
	"device-plugin":  func() int { return code(serveDevices(os.Args[1:])) },
	"logind":         func() int { return code(serveLogin(os.Args[1])) },
}

func code(err error) int {
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		return 1
	}
	return 0
}

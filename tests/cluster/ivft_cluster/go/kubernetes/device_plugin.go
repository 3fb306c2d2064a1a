//go:build nodes

package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// devicePlugin advertises devices that do not exist; the kubelet counts and allocates them as it does real ones.
type devicePlugin struct {
	api.UnimplementedDevicePluginServer
	devices []*api.Device
}

func (plugin *devicePlugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (plugin *devicePlugin) ListAndWatch(_ *api.Empty, stream grpc.ServerStreamingServer[api.ListAndWatchResponse]) error {
	if err := stream.Send(&api.ListAndWatchResponse{Devices: plugin.devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// Allocate gives a container the ids of its devices, in the variable that NVIDIA's container runtime reads.
func (plugin *devicePlugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	response := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		ids := strings.Join(container.DevicesIds, ",")
		response.ContainerResponses = append(response.ContainerResponses,
			&api.ContainerAllocateResponse{Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": ids}})
	}
	return response, nil
}

// serveDevices registers the plugin with the kubelet, and again whenever the kubelet starts anew.
func serveDevices(arguments []string) error {
	flags := flag.NewFlagSet("device-plugin", flag.ContinueOnError)
	resource := flags.String("resource", "nvidia.com/gpu", "name of the resource")
	count := flags.Int("count", 1, "number of devices")
	if err := flags.Parse(arguments); err != nil {
		return err
	}

	plugin := &devicePlugin{}
	for number := range *count {
		device := &api.Device{ID: fmt.Sprintf("GPU-%d", number), Health: api.Healthy}
		plugin.devices = append(plugin.devices, device)
	}
	socket := strings.ReplaceAll(*resource, "/", "-") + ".sock"
	for {
		if err := serveOneKubelet(plugin, *resource, socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// serveOneKubelet returns when the kubelet removes the plugin's socket, as it does at each start.
func serveOneKubelet(plugin *devicePlugin, resource, socket string) error {
	path := filepath.Join(api.DevicePluginPath, socket)
	_ = os.Remove(path)
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, plugin)
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()

	connection, err := grpc.NewClient("unix://"+api.KubeletSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	limit, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	request := &api.RegisterRequest{Version: api.Version, Endpoint: socket, ResourceName: resource}
	if _, err := api.NewRegistrationClient(connection).Register(limit, request); err != nil {
		return fmt.Errorf("register %s: %w", resource, err)
	}
	for {
		if _, err := os.Stat(path); err != nil {
			return nil
		}
		time.Sleep(200 * time.Millisecond)
	}
}

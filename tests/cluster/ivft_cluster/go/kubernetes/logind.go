//go:build nodes

package main

import (
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/prop"
)

const (
	loginName   = "org.freedesktop.login1"
	loginPath   = dbus.ObjectPath("/org/freedesktop/login1")
	loginFace   = "org.freedesktop.login1.Manager"
	delayMicros = uint64(300_000_000)
)

// inhibitor is a pipe: the caller of Inhibit holds its writing end, and gives the inhibitor back by closing it.
type inhibitor struct{ reading, writing *os.File }

// logind stands in for systemd-logind: the part of its D-Bus interface by which the kubelet delays a shutdown.
type logind struct {
	lock       sync.Mutex
	inhibitors []inhibitor
}

func (login *logind) Inhibit(what, who, why, mode string) (dbus.UnixFD, *dbus.Error) {
	reading, writing, err := os.Pipe()
	if err != nil {
		return 0, dbus.MakeFailedError(err)
	}
	login.lock.Lock()
	defer login.lock.Unlock()
	login.inhibitors = append(login.inhibitors, inhibitor{reading, writing})
	fmt.Printf("%s of %s by %s: %s\n", mode, what, who, why)
	return dbus.UnixFD(writing.Fd()), nil
}

// waitReleased returns when every holder has given its inhibitor back.
func (login *logind) waitReleased() {
	login.lock.Lock()
	defer login.lock.Unlock()
	for _, each := range login.inhibitors {
		_ = each.writing.Close() // our own copy of what the holder has
		_, _ = each.reading.Read(make([]byte, 1))
	}
}

// serveLogin announces a shutdown on SIGUSR1, and creates the file `done` when the kubelet lets the node go.
func serveLogin(done string) error {
	bus, err := dbus.ConnectSystemBus()
	if err != nil {
		return err
	}
	login := &logind{}
	if err := bus.Export(login, loginPath, loginFace); err != nil {
		return err
	}
	delay := map[string]*prop.Prop{"InhibitDelayMaxUSec": {Value: delayMicros}}
	if _, err := prop.Export(bus, loginPath, prop.Map{loginFace: delay}); err != nil {
		return err
	}
	if _, err := bus.RequestName(loginName, dbus.NameFlagDoNotQueue); err != nil {
		return err
	}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	<-asked
	if err := bus.Emit(loginPath, loginFace+".PrepareForShutdown", true); err != nil {
		return err
	}
	login.waitReleased()
	return os.WriteFile(done, nil, 0o644)
}

{{/*
fullnameOverride, else the release's name if it contains the chart's name (or nameOverride), else both joined by a
hyphen. A Service's name has at most 63 characters, and those of the chart's Services end with -metrics and -webhook.
*/}}
{{- define "internvl-operator.fullname" -}}
{{- $name := include "internvl-operator.name" . -}}
{{- $release := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $release | trunc 55 | trimSuffix "-" -}}
{{- end -}}

{{- define "internvl-operator.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "internvl-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "internvl-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of every object. The schema keeps the selector's labels out of commonLabels. */}}
{{- define "internvl-operator.labels" -}}
{{- $chart := printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 -}}
{{- $labels := dict "app.kubernetes.io/version" .Chart.AppVersion "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $labels = merge (include "internvl-operator.selectorLabels" . | fromYaml) $labels (dict "helm.sh/chart" $chart) -}}
{{- mergeOverwrite $labels (.Values.commonLabels | default dict) | toYaml -}}
{{- end -}}

{{/* Reference of an image: a dict with image (registry, repository, tag, digest) and root (the chart's context). */}}
{{- define "internvl-operator.image" -}}
{{- $registry := .image.registry | default (.root.Values.global).imageRegistry -}}
{{- $repository := empty $registry | ternary .image.repository (printf "%s/%s" (trimSuffix "/" ($registry | toString)) .image.repository) -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Pull secrets as JSON: those of the given list and global.imagePullSecrets, each once. */}}
{{- define "internvl-operator.pullSecrets" -}}
{{- concat (.secrets | default list) ((.root.Values.global).imagePullSecrets | default list) | uniq | toJson -}}
{{- end -}}

{{- define "internvl-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "internvl-operator.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | required "serviceAccount.name: found nothing, expected the name of an existing ServiceAccount, because serviceAccount.create is false" -}}
{{- end -}}
{{- end -}}

{{/* The operator's rights in a namespace. It reads no Secret there: pods refer to them by name. */}}
{{- define "internvl-operator.rules" -}}
- apiGroups: [internvl.dev]
  resources: [internvlfinetunes]
  verbs: [list, watch, delete]        # delete: runPolicy.ttlSecondsAfterFinished
- apiGroups: [internvl.dev]
  resources: [internvlfinetunes/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps, services]   # Kubernetes deletes them with their owner
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]              # patch: a repeated event raises the first one's count
{{- if .Values.networkPolicy.enabled }}
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]        # one for each run
  verbs: [get, list, watch, create, patch]
{{- end }}
{{- $groups := dict "volcano" "scheduling.volcano.sh" "coscheduling" "scheduling.x-k8s.io" }}
{{- range .Values.gangSchedulers }}
- apiGroups: [{{ get $groups . }}]
  resources: [podgroups]
  verbs: [get, list, watch, create, patch]
{{- end }}
{{- end -}}

{{/* Who may reach /metrics and /progress of a run's pods: this operator, and Prometheus. */}}
{{- define "internvl-operator.peers" -}}
{{- $namespace := dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace) -}}
{{- $pods := dict "matchLabels" (include "internvl-operator.selectorLabels" . | fromYaml) -}}
{{- prepend .Values.networkPolicy.prometheus (dict "namespaceSelector" $namespace "podSelector" $pods) | toJson -}}
{{- end -}}

{{/* A proxy's URL; a dict with name and url. The message shows no part of a password. */}}
{{- define "internvl-operator.proxyUrl" -}}
{{- if contains "@" .url -}}
{{- fail (printf "proxy.%s: found a user name or a password, expected http://host:port; pods of every namespace would show it, so let runs set HTTPS_PROXY in podTemplate.env from a Secret of their namespace" .name) -}}
{{- end -}}
{{- if and .url (not (regexMatch "^https?://[^\\s/]+/?$" .url)) -}}
{{- fail (printf "proxy.%s: found %q, expected http://host:port" .name .url) -}}
{{- end -}}
{{- .url -}}
{{- end -}}

{{/*
Proxy and CA variables of the operator, as a JSON list; extraEnv wins. The API server is always reached directly: the kubelet
puts its address where the reference is.
*/}}
{{- define "internvl-operator.egress" -}}
{{- $set := dict -}}
{{- range $name := list "http" "https" -}}
{{- $url := include "internvl-operator.proxyUrl" (dict "name" $name "url" (get $.Values.proxy $name | default "")) -}}
{{- if $url -}}
{{- $_ := set $set (printf "%s_PROXY" (upper $name)) $url -}}
{{- end -}}
{{- end -}}
{{- if or $set .Values.proxy.noProxy -}}
{{- $direct := list "localhost" "127.0.0.1" "::1" ".svc" ".cluster.local" "$(KUBERNETES_SERVICE_HOST)" .Values.proxy.noProxy -}}
{{- $_ := set $set "NO_PROXY" (compact $direct | join ",") -}}
{{- end -}}
{{- range $name := keys $set -}}
{{- $_ := set $set (lower $name) (get $set $name) -}}
{{- end -}}
{{- if .Values.caBundle.configMap -}}
{{- range $name := list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" -}}
{{- $_ := set $set $name "/etc/internvl/ca/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- $taken := list -}}
{{- range .Values.extraEnv -}}
{{- $taken = append $taken (lower .name) -}}
{{- end -}}
{{- $found := list -}}
{{- range $name := keys $set | sortAlpha -}}
{{- if not (has (lower $name) $taken) -}}
{{- $found = append $found (dict "name" $name "value" (get $set $name)) -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{- define "internvl-operator.subject" -}}
- kind: ServiceAccount
  name: {{ include "internvl-operator.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}

{{/* Fields of a Service; nothing by default, so that the cluster decides. */}}
{{- define "internvl-operator.ipFamilies" -}}
{{- with .Values.service.ipFamilyPolicy }}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .Values.service.ipFamilies }}
ipFamilies: {{ toJson . }}
{{- end }}
{{- end -}}
